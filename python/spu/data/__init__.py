"""What a model is trained on: files as tokens, and batches of them.

text.py         how a text file is read
tokenizer.py    text to token ids and back
corpus.py       a text as tokens, cut into training and validation parts; batches
"""
