"""Label files: bytes to Label.

parse     the JSON, field by field, and what is wrong with it
schema    the fields of the JSON that are read
nesting   JSON that is too deep
timecode  timecodes, lengths and dates
"""
