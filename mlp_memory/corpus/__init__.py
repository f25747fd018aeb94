"""Text comes in (files of many kinds, datasets, mixtures of them); a token stream goes out.

`tokenize` splits the documents into train, validation and test, trains or takes over a
SentencePiece vocabulary and writes WORKDIR/corpus; it alone needs seqio and TensorFlow.
Every later stage reads the result with `stream.TokenStream`, and `vocabulary.Vocabulary`
turns tokens into text for `generate` and the report.
"""
