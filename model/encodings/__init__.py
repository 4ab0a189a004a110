"""Prompts and targets encoded beforehand, served to training without a difference.

stored.py   one row: packing, keys, unpacking
make.py     rows of prompts -> rows of encodings (what `vimi-data encode` runs)
check.py    which encodings serve which training
store.py    a certified folder of them; the encoder that reads instead of computing
"""
