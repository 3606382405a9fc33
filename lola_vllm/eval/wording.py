"""The sentences that prompts are made of, word for word as published, so that results compare.

Needle tasks and variable tracking: RULER (arXiv 2404.06654), its odd spelling included. Pass key:
landmark attention (arXiv 2305.16300). The keys' words are our own.
"""

from __future__ import annotations

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NOISE_LINE = " ".join(NOISE)

# {kind}: number or uuid. Needles name the plural even where there is one, as RULER's do.
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
NEEDLE_PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {key} mentioned in the provided text?"
)
NEEDLE_ANSWER = "The special magic {kind} for {key} mentioned in the provided text is"

PASS_KEY = "The pass key is {key}. Remember it. {key} is the pass key."
PASS_KEY_PROMPT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there.\n{context}\n"
    "What is the pass key?"
)
PASS_KEY_ANSWER = "The pass key is"

CHAIN_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
CHAIN_ANSWER = (
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assgined the value {value}, they are:"
)

_ADJECTIVES = (
    "amber ancient bitter blunt brave brisk calm clever coarse cosmic crisp curious daring "
    "deep distant dusty eager early fierce foggy frozen gentle giant golden grand hasty "
    "hidden hollow humble icy idle jolly keen lively lonely loud lucky mellow mighty modest "
    "narrow noble odd pale patient polite proud quick quiet rapid restless rough royal rustic "
    "salty sharp shiny silent silver simple sleepy slender smooth solid sour steady stormy "
    "strange subtle sunny swift tender tidy tiny vague vast velvet vivid warm weary wild "
    "windy wise witty young"
)
_NOUNS = (
    "anchor apple arrow autumn badge basket beacon bell bottle branch bridge button cabin "
    "candle canyon castle cedar chapter circle cliff clock cloud coast comet copper corner "
    "cradle desert dragon drum eagle echo engine falcon feather fiddle forest fountain garden "
    "glacier hammer harbor hazel hill island ivory jacket jungle kettle ladder lantern lemon "
    "lever lizard magnet maple marble meadow mirror mountain needle ocean orchard otter "
    "paddle palace pearl pebble pepper piano pillow planet pocket prairie quarry rabbit raven "
    "ribbon river rocket saddle sailor shadow shelter signal spoon spring stable summit "
    "temple thunder tiger timber tower tunnel turtle valley velcro violin wagon walnut "
    "whistle willow window winter zebra"
)
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
