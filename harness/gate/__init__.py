"""The accuracy gate: the same questions to two implementations, and one statistical verdict.

    task        the questions as lm-eval asks and scores them             exchange    requests and answers as JSON lines
    answerers   who answers: a transformers model, a model of ours, a server
    identity    what an answer depends on                                 ledger      answers kept under exactly that
    answering   requests to answers, a batch at a time, resumable
    statistics  McNemar, non-inferiority, how many questions would decide
    judging     two sets of answers to a result                           view        terminal and HTML

lm-eval runs where the questions are made and where they are scored; an engine is needed only in between.
"""
