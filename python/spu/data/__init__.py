"""What a model is trained on: files as tokens, and batches of them.

files.py                    which files are meant, and what each is
text.py                     how a text file is read
jsonl.py, delimited.py      rows of JSON Lines, and of CSV files
tables.py                   those of Parquet files and saved datasets
rows.py, chat.py            rows as examples: what of them is trained
example.py, tokenizer.py    a document before and after the tokenizer; text to token ids and back
internlm2.py                InternLM2's tokenizer, without its remote code
sentencepiece.py            its ``tokenizer.model``, without the package that made it
stream.py, documents.py     text as tokens in one pass; documents as tokens in files
store.py                    arrays that are made once and read where they lie
packing.py, order.py        documents in rows of a fixed length; the order of an epoch
parts.py, corpus.py         batches of windows or of rows; what a run trains on and validates with
"""
