"""The rules: pure functions from values to a verdict, a prompt, a window or a shard plan. None
touches a file, a database or the network.

    config    what they are told ([filters], [prompt], [split], [windows] of the configuration)
    quality   which clips are good enough
    prompt    which sentences make a prompt
    shots     the shots of a label, by its timecodes
    windows   which stretches of a clip become samples
    split     train or val, by programme
    shards    which windows share a shard
"""
