"""What the models are worth: held-out perplexity of every system, the table, the report.

Reads the finished artifacts, writes WORKDIR/reports; called last, and by people who compare.
"""
