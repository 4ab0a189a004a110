"""Finds the videos that are to be evaluated, decodes them safely, and writes protocols' prompts as shards."""
