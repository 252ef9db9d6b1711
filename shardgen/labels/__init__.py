"""Label files: bytes to Label.

parse     the JSON, field by field, and what is wrong with it
timecode  timecodes, lengths and dates
"""
