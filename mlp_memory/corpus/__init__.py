"""Text comes in (files of many kinds, datasets, mixtures of them); a token stream goes out.

`tokenize` splits the documents into train, validation and test, trains a SentencePiece
vocabulary or takes over any tokenizer, and writes WORKDIR/corpus, units of documents in as
many processes as there are cores; it alone needs seqio and TensorFlow.
Every later stage reads the result with `stream.TokenStream`, and `vocabulary.Vocabulary`
turns tokens into text for `generate` and the report.
"""
