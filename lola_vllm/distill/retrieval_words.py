"""Words and sentences that synthetic retrieval prompts are made of, in plain English."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter blue bold brass brave bright broken calm careful clever cold copper "
    "crimson curious dark distant dusty eager early empty faint fancy fierce frozen gentle giant "
    "golden green grey happy hidden hollow honest humble icy idle iron ivory jolly keen large "
    "late lazy little lonely loud lucky marble mellow modest narrow noble odd old open pale "
    "patient plain polite proud purple quick quiet rapid rare red restless rough round rusty "
    "sacred scarlet shallow sharp shy silent silver simple sleepy slow small smooth soft solid "
    "spare steady stone strange sturdy sudden sweet tall tender tiny tired upper vast violet warm "
    "weary white wide wild windy wise wooden yellow young"
)
NOUNS = _words(
    "acorn anchor anvil apple arrow badger balcony barrel basket beacon bell bicycle blanket boat "
    "bottle bridge bucket button cabin camel candle canyon carpet castle cathedral cellar chair "
    "chimney circus clock cloud comet compass cottage cradle crystal curtain desert dolphin door "
    "dragon drum eagle engine falcon farm feather fence fiddle flute forest fountain fox garden "
    "gate glacier glove goose hammer harbor hat hawk helmet honey horse island jacket jungle "
    "kettle key kite ladder lagoon lake lantern library lighthouse lion lizard mango map market "
    "meadow mill mirror mountain museum needle nest oak ocean orchard otter owl paddle palace "
    "parrot pepper piano pillow planet pond prairie puzzle rabbit raven ribbon river robin rocket "
    "saddle sail scarf school shell shovel sparrow spoon station sword table temple thunder tiger "
    "tower trumpet tunnel turtle valley vessel village violin wagon walnut water whale wheel "
    "window winter wolf zebra"
)
FIRST_NAMES = _words(
    "Ada Albert Amir Anna Arthur Beatrice Carlos Clara Daniel Diana Elena Emil Fatima Felix Grace "
    "Hannah Henry Ida Igor Irene Ivan James Joan Jonas Julia Karim Laura Leo Lucy Maria Martin "
    "Mei Miguel Nadia Nina Noah Olga Oscar Paula Peter Priya Rosa Ruth Samuel Sofia Thomas Uma "
    "Victor Vera Walter Yusuf Zoe"
)
LAST_NAMES = _words(
    "Abbott Adler Baker Becker Brandt Carter Castillo Chen Costa Dalton Diaz Dubois Evans Farrow "
    "Fischer Garcia Grant Hale Hoffman Ibrahim Ivanov Jansen Keller Khan Kowalski Lang Lindgren "
    "Marsh Mendes Meyer Moreau Nakamura Novak Olsen Okafor Park Patel Quinn Ramos Reed Rossi "
    "Sato Schmidt Silva Singh Stone Tanaka Torres Vargas Walsh Weber Young Zhang"
)

# Sentences of a few words each, for haystacks in which only the hidden facts have information.
SENTENCES = (
    "The wind moves the leaves.",
    "Water runs down the hill.",
    "A dog sleeps by the door.",
    "The clock on the wall ticks.",
    "Bread is baked every morning.",
    "The road goes past the mill.",
    "Snow falls on the roof.",
    "The children walk to school.",
    "A boat waits at the pier.",
    "The lamp is on the table.",
    "Bees fly from flower to flower.",
    "The train leaves on time.",
    "Rain drums on the window.",
    "The cat looks at the bird.",
    "Somebody sings in the kitchen.",
    "The moon is above the trees.",
    "We wait for the bus.",
    "The soup is still hot.",
    "A letter lies on the mat.",
    "The market opens at dawn.",
    "Old books smell of dust.",
    "The river is wide and slow.",
    "Nobody is in the garden.",
    "The kettle begins to sing.",
    "Horses stand in the field.",
    "The shop sells nails and rope.",
    "A ladder leans on the wall.",
    "The path turns to the left.",
    "Clouds gather over the sea.",
    "The fire has burned low.",
    "Apples lie in the basket.",
    "The teacher closes the book.",
    "Up the stairs and down again.",
    "So it was yesterday, and so it is today.",
    "One step follows another.",
    "Nothing else happens here.",
    "The day is long and the evening is short.",
    "First the left foot, then the right.",
    "Everything stays as it was.",
    "And then it starts from the beginning.",
)
