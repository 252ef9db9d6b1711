"""See the data, the runs and the results; decide; vote: python -m tools.dashboard.

app guard          routes and errors; what every request has to pass
pages/             a module per page; render: a request as they see it
language           every sentence in Korean and English (wording/)
sources state      what is looked at; what lives as long as the process
catalog search     a build's catalog, read only; full-text search in a file of our own
indexing           fills that file in the background
files records      files that somebody else is writing, and their types
runs               what the files of a run say
media proxy        pictures and clips by range; H.264 for those that browsers don't play
review pairs       decisions and votes, kept; which pairs a rater is asked about
exports            CSV for spreadsheets, and exclusions.csv
"""
