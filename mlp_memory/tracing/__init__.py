"""Which training text stands behind a teacher or a prediction, by document, text and weight.

Rows or a prompt come in, with the index and the targets; out goes plain JSON that the terminal (`text`)
and the report show. `evidence` has the neighbours of a state, `teacher` those of a training row,
`predictions` what the models say there; `documents` names documents; `command` is the command line.
"""
