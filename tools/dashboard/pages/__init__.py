"""A module per page.

overview            how many label files there are, and the newest runs
preprocessing       a build's stages, rates, failures and shards
figures             statistics and quality
defects case        label files by reason; one of them
decisions           what people decided on them
training samples    runs on one chart each; what they drew
compare vote        an evaluation's tables; blind pairs
explain login       what a figure means; the token
"""
