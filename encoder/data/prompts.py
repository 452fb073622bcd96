"""The two questions that the scenes ask, the MLLM learns and the evaluations repeat, word for word."""

GROUNDING_QUESTION = "Where is {}?"
REFERRING_QUESTION = "What is {}?"
