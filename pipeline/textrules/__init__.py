"""Judging many texts at once by rules over their characters, words, lines and repetitions."""
