"""Neural models as the criteria see them: where their files come from, what they say of a text, how they are trained.

Everything here needs the extra `models`; `files` alone imports nothing of it.
"""
