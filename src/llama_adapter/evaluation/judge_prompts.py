"""What judges are asked, in our own words. `--judge-prompts FILE` replaces any of them.

The published prompts are not ours to ship; numbers from other prompts are another measure, which
is why the prompt and its hash are in every result.
"""

from __future__ import annotations

_FORMAT = "Reply with one line and nothing else"

SHORT_ANSWER = f"""A question about a video has a known answer. Decide whether a given answer \
means the same.

Question: {{question}}
Known answer: {{gold}}
Given answer: {{answer}}

Synonyms, paraphrases and more specific answers count as the same. Score how well the given \
answer agrees, from 0 (not at all) to 5 (completely).
{_FORMAT}, in this form: {{"pred": "yes", "score": 4}} (pred is "yes" or "no")."""

_ANSWER = """Question about a video: {question}
Known answer: {gold}
Given answer: {answer}

"""
_SCALE = f"""

Score from 0 (worst) to 5 (best). {_FORMAT}, in this form: {{"score": 3}}"""

VIDEO_ASPECTS = {
    "correctness": _ANSWER
    + "Are the facts in the given answer right? Judge by the known answer; what contradicts it "
    "or cannot follow from it is wrong. Other wording is fine." + _SCALE,
    "detail": _ANSWER
    + "Is the given answer complete and specific? It should cover every main point of the known "
    "answer, with particulars rather than generalities." + _SCALE,
    "context": _ANSWER
    + "Does the given answer understand the situation? It should fit the overall setting and "
    "subject of the video as the known answer tells it, and not miss its main theme." + _SCALE,
    "temporal": _ANSWER
    + "Does the given answer have events in their right order? Judge the sequence it tells "
    "against that of the known answer." + _SCALE,
    "consistency": """Two questions about a video mean the same and have one known answer.

Question 1: {question}
Question 2: {question_2}
Known answer: {gold}
Answer given to question 1: {answer}
Answer given to question 2: {answer_2}

Do the two given answers agree with each other and with the known answer? Contradictions between \
them weigh most."""
    + _SCALE,
}

REASONED_ANSWER = f"""A question about one or several images has a known answer, reached by the \
steps below.

Question: {{question}}
Known answer: {{gold}}
Steps:
{{steps}}

Given answer: {{answer}}

Grade the given answer from 0 to 1. An answer with the right conclusion gets 1. A wrong or missing \
conclusion gets credit for each of the steps that the given answer contains, in proportion to \
their number.
{_FORMAT}, in this form: {{"score": 0.5}}"""

_PAIR = """Question:
{question}

--- Answer of assistant 1 ---
{answer_1}
--- End of answer 1 ---

--- Answer of assistant 2 ---
{answer_2}
--- End of answer 2 ---

"""
_PAIR_SCALE = """
On the first line write two numbers from 1 (worst) to 10 (best), the score of assistant 1 and the \
score of assistant 2, with a space between them and nothing else. Explain from the second line on. \
Which answer comes first must not matter."""

PAIRWISE = {
    "general": _PAIR
    + "Compare the two answers: are they helpful, relevant, accurate and detailed enough?"
    + _PAIR_SCALE,
    "coding": _PAIR
    + "Compare the two programs: do they do what is asked, are they correct, efficient, readable "
    "and explained?" + _PAIR_SCALE,
    "math": _PAIR
    + "Solve the problem yourself before you compare, without writing it down. Then compare "
    "results and steps: a wrong result cannot be good." + _PAIR_SCALE,
}
