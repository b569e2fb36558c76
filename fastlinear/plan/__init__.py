"""The question and the answer: a problem, who may run it, a race between them, and what is remembered."""
