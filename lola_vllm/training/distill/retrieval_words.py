"""Words and sentences that synthetic retrieval prompts are made of, in plain English.

Keys and values are none of the words that `lola_vllm.evaluation` hides and asks for.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "able alert alpine arctic awake bald basic blank bleak blond bold bony bouncy brass brief "
    "bright bronze bulky busy careful casual cheap cheerful chilly civil classic clean clear "
    "cloudy cold common complex cozy creamy crooked crowded damp dark decent dense digital dizzy "
    "double dreamy dry dull easy elastic elder elegant empty even expert extra faint fair famous "
    "fancy fast fearless festive flat fluffy foreign formal fragile free fresh frosty full funny "
    "fuzzy generous glad glossy great greedy half handy happy harsh heavy helpful high honest hot "
    "huge hungry inner iron jagged juicy large late lazy leafy lean light linen little local long "
    "loose lovely loyal lunar massive merry mild misty mixed modern moist muddy mute native neat "
    "nervous new nice nimble normal northern nutty oily old open outer oval paper peaceful "
    "perfect plain plastic pleasant plump pretty private public pure quaint rainy rare raw ready "
    "red rich ripe robust rosy round rubber rusty sacred sandy scarlet serious shallow shy "
    "sincere slim slippery slow small snowy soft solar southern spare spicy spiral square stone "
    "sturdy sudden sugary super sweet swollen tall tame teal thick thin thorny tight tired upper "
    "urban useful usual valid warped wary western wet wide wooden woolen yearly zesty"
)
NOUNS = _words(
    "acorn airport almond ambulance antelope anvil apron arena armchair badger bagel balcony "
    "ballet balloon bamboo banana banjo banner barge bay beach bear beaver bicycle biscuit "
    "blanket blossom boat border bowl box bracelet bread broom bubble bucket buffalo bus cabbage "
    "cafe cage camel camera canal canoe carpet carriage carrot cathedral cave cello chair cheese "
    "cherry chest chicken church cinema circus cookie coral cottage cotton cow crab crane crayon "
    "cricket crown crystal cup curtain daisy dolphin donkey door doughnut duck elbow elk envelope "
    "farm fence ferret field finger fish flag flute fox frog garlic gate ginger goat goose "
    "gorilla grape grass guitar hawk hedge helmet heron honey hook horse hotel house iceberg ink "
    "insect jar jelly kennel kitchen koala lake lamp lawn leaf leopard letter lily lion lobster "
    "locker lunch machine map market mask meal medal melon menu mint monkey moon mop moth motor "
    "mouse mushroom napkin nest net nut oak oasis office olive onion oven ox oyster pan panda "
    "panther park parrot path peach peanut pear pencil penny pigeon pine pipe pirate pizza plate "
    "plum pond pony potato pump puppet purse puzzle quilt racket radio raft rail rice ring road "
    "roof rope rose rug ruler sand sausage school seal shark sheep shell ship shirt shoe shovel "
    "sink ski sled snail snake soap sock soup sparrow spider squirrel stamp station stove straw "
    "sugar suitcase sun swan sweater sword table tank tea teapot ticket toast tomato tooth towel "
    "toy train tray tree truck trumpet turkey umbrella vase vest village wall wallet wasp watch "
    "water whale wheat wheel wolf wool yacht yard"
)
FIRST_NAMES = _words(
    "Abigail Ada Adam Ahmed Aisha Alan Alexander Alice Amir Amy Andrea Anna Anton Arthur Beatrice "
    "Boris Brian Bruno Camille Carlos Caroline Cesar Charlotte Chloe Christine Claire Daniel "
    "David Diana Diego Elena Emil Emma Eric Esther Fatima Fiona Frank Gabriel George Grace Hannah "
    "Hassan Henry Hugo Ida Igor Ingrid Irene Isabel Ivan Jack James Jane Jin Joan Jonas Julia "
    "Karim Kate Kenji Laura Leila Leo Linda Louis Lucy Luis Maria Mario Martin Maya Mei Mia "
    "Miguel Nadia Naomi Nina Noah Olga Omar Pablo Paula Peter Priya Rachel Rafael Ravi Robert "
    "Rosa Ruth Samuel Sara Simon Sofia Stefan Susan Thomas Tom Uma Vera Walter Wei Yusuf Zoe"
)
LAST_NAMES = _words(
    "Abbott Adler Baker Becker Bergman Bianchi Brandt Carter Castillo Chen Clark Cohen Costa "
    "Dalton Davies Diaz Dubois Evans Farrow Fischer Fraser Garcia Gomez Grant Gupta Hale Harris "
    "Hoffman Hughes Ibrahim Ivanov Jansen Johnson Keller Kelly Khan Kim Kowalski Kumar Lang "
    "Larsen Lee Lindgren Lopez Marsh Mendes Meyer Miller Moreau Morgan Murphy Nakamura Nelson "
    "Novak Okafor Olsen Park Patel Perez Peterson Popov Quinn Ramos Reed Robinson Rossi Santos "
    "Sato Schmidt Schneider Shah Silva Singh Smith Stewart Suzuki Tanaka Taylor Torres Tran "
    "Turner Vargas Vogel Walker Walsh Watson Weber Williams Wilson Wright Zhang Zimmerman"
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
