"""How many of the words that a fairy-tale run tells occur in the tales.

python benchmarks/story_words.py runs/fairy-tales
"""

import re
import sys

import babyllama
from babyllama.api import write_story
from babyllama.data.library import named

BEGINNING, SEEDS = "There was once", range(1, 21)

known = {word for tale in named("fairy-tales") for word in re.findall("[a-z]+", tale.text.lower())}
llama = babyllama.load(sys.argv[1])
told: list[str] = []
for seed in SEEDS:
    story = write_story(llama, BEGINNING, seed)
    told += re.findall("[a-z]+", story.lower())[:-1]  # the last word may be cut
real = sum(word in known for word in told)
print(f"{len(SEEDS)} stories, {len(told):,} words, {100 * real / len(told):.1f} % of them in the tales")
