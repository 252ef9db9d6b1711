"""What a build tells people. Of the configuration it gets what it needs from cli and build.

config         what each check has to reach ([report] of the configuration)
figures        what is counted and measured of the data, and the checks with their targets
files          quality_report.json, the CSV files, metadata.jsonl
spreadsheet    CSV that a spreadsheet opens as it should
summary        the same as tables in a terminal
page           the same as one HTML page, from page.html
labels_ko_en   what the codes mean, in English and Korean
inspect_clip   what becomes of one clip; inspect_shard: what a shard holds
progress       how far a build is: bars, log lines, build.jsonl
estimate       what a build would come to
"""
