"""The closed word classes of English and the words of video captions that the entity rules need.

Function words are a closed class and listed whole. Of the open classes only those words stand here that
a rule can't do without: adjectives (so that "a small swimming pool" is one phrase and "a man swimming"
is not), verbs whose -s form follows a noun ("the man rides"), nouns that name the shot and not a thing
in it ("a close up of ..."), and places (what a background is). All of them were collected from captions
of web videos; a word that is missing costs an entity, never makes a wrong one up.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SINGULAR_DETERMINERS = _words("a an another one each every this that")
DETERMINERS = SINGULAR_DETERMINERS | _words("the his her its their my your our some any")
PLURAL_COUNTS = _words(
    "two three four five six seven eight nine ten many several few some both various multiple these those"
    " dozens hundreds all other others people men women children kids mens audience crowd crew team family band"
    " couple"
)
COUNTED = _words("people men women children kids audience crowd crew team family band couple")
"""Those of them that name the things themselves."""
PEOPLE = _words("man woman guy girl lady person")
"""Nothing is named by these and a further noun: what follows is a verb."""
NOBODY = _words("someone somebody anyone he she they we i you")
CONTAINERS = _words("pot pan bowl cup mug glass plate bottle jar can tray bag box basket bucket spoon")
REQUESTS = _words("place push pull use stir turn wipe fold stack slide press pour grab lift unfold flip")
AFTER_REQUESTS = DETERMINERS | _words("up out down in on off away one two all")
NOUNS_LY = _words("butterfly dragonfly firefly fly family belly jelly lily bully assembly")
NOUNS_S = _words("news sports glasses scissors christmas texas jeans lens gas bus")
"""Singular nouns, or first halves of one, that end in s."""
PLACE_PREPOSITIONS = _words(
    "in on at near inside across through along over under around by beside behind into onto down up"
    " against within above below between outside off from to towards toward past"
)
PREPOSITIONS = PLACE_PREPOSITIONS | _words(
    "of with without for about as like than during after before until while because using via per among"
    " amongst beyond upon out behind front next"
)
CONJUNCTIONS = _words("and or but nor so then while when where who which whose that if what how why")
PRONOUNS = _words(
    "i you he she it we they him them me us himself herself itself themselves someone somebody something"
    " there here everyone everything nothing each"
)
AUXILIARIES = _words(
    "is are was were be been being am has have had having do does did doing can could will would may might"
    " must shall should gets get got getting s t not n't no"
)
ADVERBS = _words(
    "very quickly slowly together away outside inside very too also just now again back forward backward"
    " up down around here there still while well only almost fast not forwards backwards upwards downwards"
    " except farthest nearest"
)
STOPS = PREPOSITIONS | CONJUNCTIONS | PRONOUNS | AUXILIARIES | ADVERBS | DETERMINERS

ADJECTIVES = _words(
    "smaller bigger larger taller longer shorter older younger"
    " black white red green blue yellow orange purple pink brown grey gray golden silver dark light bright"
    " pale colorful colourful blond blonde transparent clear metallic wooden plastic metal steel glass stone"
    " paper leather rubber ceramic cardboard concrete woolen silk cotton"
    " small little tiny big large huge giant tall short long wide narrow thick thin deep round square flat"
    " curved great massive miniature heavy full empty open closed wet dry hot cold frozen fresh raw"
    " old young new ancient modern vintage antique baby adult elderly middle-aged teenage male female"
    " beautiful pretty cute handsome funny happy sad angry sleepy fluffy furry hairy bald bearded shirtless"
    " topless muscular fat slim strong wild domestic stray lone single solo other same different first"
    " second third last left right upper lower top bottom front rear back middle"
    " rocky sandy snowy grassy dusty muddy icy sunny cloudy rainy foggy dirty clean shiny"
    " american african asian chinese indian japanese german french british english mexican italian russian"
    " korean spanish african-american"
    " famous professional amateur local foreign animated cartoon fictional digital electric electronic"
    " outdoor indoor underground underwater aerial commercial public private residential urban rural"
    " spartan ornate fancy plain simple busy calm quiet crowded tropical"
)
VERBS_S = _words(
    "rides walks talks plays runs sits stands shows speaks sings dances drives cooks eats drinks makes cuts"
    " holds jumps swims flies moves goes comes looks takes puts gives performs explains demonstrates describes"
    " discusses uses opens closes pours mixes adds stirs fries falls climbs throws catches kicks hits shoots"
    " fights hugs kisses smiles laughs cries sleeps lies lays rolls spins turns pulls pushes carries lifts"
    " launches paddles surfs skates skis browses preforms reads writes draws paints types works watches listens"
    " waits wears touches feeds chases follows crosses enters leaves crawls barks meows reports reviews"
    " introduces tells asks says sees gets picks places folds washes cleans peels slices chops bakes prepares"
    " shakes waves rests grazes flips demos narrates interviews exits approaches tries begins starts stops"
    " appears seems keeps lands rises drops hangs floats flows crashes races explores presents leads"
)
VERBS_BASE = _words(
    "walk run play ride sit stand talk sing dance drive eat feed fight jump swim fly move go come look take put"
    " give perform make cook hold open close pick remove hang lay set got ran sat stood held made took put"
    " spoke sang drove ate fell went came flew rode began wore threw shot cut"
)
SHOT_NOUNS = _words(
    "view close closeup close-up shot scene video clip footage film movie recording image picture photo"
    " photograph screenshot rendering render painting illustration drawing cartoon animation camera"
    " perspective angle group bunch pair lot crowd number set series kind type sort piece variety"
    " row line side front back top bottom middle center centre left right end corner edge part rest"
    " foreground background distance way time day night morning evening moment sunset sunrise dusk dawn"
    " show game match song music trick goal shot turn voice conversation interview story something thing"
    " person's use hole light sound color colour shade name word text logo screen title segment program"
    " episode news report commercial trailer tutorial demo demonstration competition event party race"
    " air body front amount bit style manner order fun help pile wind weather neck hair hand arm leg"
    " foot finger others"
)
WORN = _words(
    "suit coat jacket shirt t-shirt blouse sweater hoodie dress skirt tie hat cap helmet scarf costume armor"
    " armour uniform apron mask outfit robe vest glove boot shoe sunglasses"
)
"""What people wear moves with them: a cut-out of it is a cut-out of the person."""
PLACES = _words(
    "grass beach yard field street road water forest room kitchen garden snow sky river ocean park desert"
    " stage arena sea lake pool mountain mountains hill hills valley city town village countryside farm barn"
    " court gym stadium track freeway highway bridge tunnel parking lot garage office studio classroom school"
    " church temple castle store shop market mall restaurant bar cafe hallway bedroom bathroom house home"
    " building station airport runway harbor harbour dock pier shore coast cliff cave canyon waterfall jungle"
    " woods meadow pasture lawn sidewalk path trail driveway alley intersection zoo aquarium reef sand dirt"
    " mud floor ground wall carpet rug ceiling sofa couch bed landscape terrain background space moon earth"
    " range island pond stream swamp wave waves clouds cloud backyard patio balcony roof rooftop table desk"
    " counter lab laboratory factory warehouse workshop hospital theater theatre museum library ring playground"
    " skatepark pad dune dunes ruins area moss branch rock rocks skyline ice"
)
BARE_NOUNS = _words(
    "man woman boy girl person child baby kid guy lady dog cat puppy kitten horse cow sheep goat pig bird"
    " duck chicken eagle owl fish shark whale dolphin turtle snake lizard frog monkey gorilla chimpanzee"
    " panda bear lion tiger leopard elephant giraffe zebra deer rabbit squirrel mouse hamster fox wolf car"
    " truck bus train motorcycle bicycle bike boat ship airplane plane helicopter robot chef singer"
    " player athlete dancer musician soldier teacher student doctor skateboarder surfer skier cyclist clown"
)
PERSONS = _words(
    "man woman boy girl person child baby kid guy lady gentleman dad father mom mother brother sister son"
    " daughter husband wife friend boyfriend girlfriend uncle aunt grandfather grandmother grandma grandpa"
    " toddler teenager teen adult male female women men lad fellow dude chick bride groom king queen"
    " prince princess chef cook singer player athlete dancer musician soldier teacher student doctor nurse"
    " skateboarder surfer skier cyclist clown wrestler boxer fighter comedian actor actress model host"
    " reporter anchor journalist artist pharmacist driver salesman speaker contestant guest fan cowboy"
    " pilot farmer worker officer policeman cop judge coach referee gamer drummer guitarist pianist rapper"
    " dj magician barber cobbler carpenter mechanic contractor waiter waitress customer owner user"
    " attendant astronaut scientist engineer lawyer politician president senator celebrity hero wizard"
    " monk priest nun bride gymnast swimmer runner golfer goalkeeper pitcher batter youtuber blogger"
    " vlogger narrator presenter interviewer cheerleader ballerina acrobat biker rider jockey hunter"
    " fisherman firefighter paramedic surgeon dentist therapist hairdresser stylist"
)
"""Who has a face."""
ANIMALS = _words(
    "dog cat puppy kitten horse cow sheep goat pig bird duck chicken eagle owl fish shark whale dolphin"
    " turtle snake lizard frog monkey gorilla chimpanzee chimp panda bear lion tiger leopard elephant"
    " giraffe zebra deer rabbit squirrel mouse hamster fox wolf rhino hippo camel donkey mule pony calf"
    " lamb bull ox buffalo bison moose elk kangaroo koala otter seal walrus penguin parrot crow swan goose"
    " turkey rooster hen peacock flamingo pigeon hawk falcon butterfly bee ant spider crab lobster octopus"
    " squid jellyfish shrimp snail worm caterpillar dragonfly beetle alligator crocodile dinosaur shepherd"
    " terrier retriever poodle bulldog husky corgi dachshund raccoon skunk badger beaver hedgehog bat rat"
    " gecko iguana chameleon toad ape orangutan lemur cub animal pet"
)
PRODUCTS = _words(
    "car truck bus train motorcycle bicycle bike boat ship airplane plane helicopter robot jeep van taxi"
    " tractor scooter skateboard surfboard snowboard canoe kayak convertible suv sedan ambulance tank"
    " rocket drone toy doll phone smartphone laptop computer keyboard mouse camera tv television monitor"
    " tablet console controller headphones speaker microphone guitar piano violin drum trumpet saxophone"
    " flute blender mixer oven microwave toaster kettle pot pan bowl cup mug plate bottle glass knife fork"
    " spoon lid jar can bag backpack suitcase watch clock lamp chair sofa umbrella ball basketball"
    " football racket gun rifle sword drill hammer saw machine engine tire wheel stroller book cake pizza"
    " burger"
)
THINGS = PERSONS | ANIMALS | PRODUCTS
"""What a caption can name beside its first subject without an article."""
