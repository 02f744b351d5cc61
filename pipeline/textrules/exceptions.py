"""English words that the tokenizer's general rules would cut wrongly: contractions, abbreviations, emoticons, units.

The same words as spaCy 3.8's English exceptions.
"""

from __future__ import annotations

from itertools import product


def _words(text: str) -> list[str]:
    return text.split()


def _contractions() -> dict[str, tuple[int, ...]]:
    """Where the parts of a contraction begin; also without its apostrophe ("dont") or with a curly one."""
    pronouns, questions = _words("i you he she it we they"), _words("who what when where why how there")
    verbs = _words("ca could do does did had may might must need ought sha should wo would")
    will = (["'ll"], ["'ll", "'ve"], ["'d"], ["'d", "'ve"])
    parts: list[list[str]] = [["i", "'m"], ["i", "'m", "a"]]
    parts += [[word, *tail] for word in [*pronouns, *questions, "that", "this", "these", "those"] for tail in will]
    parts += [[word, "'ve"] for word in ["i", "you", "we", "they", *questions, "these", "those", "not"]]
    parts += [[word, "'re"] for word in ["you", "we", "they", *questions, "these", "those"]]
    parts += [[word, "'s"] for word in ["he", "she", "it", *questions, "that", "this"]]
    parts += [[verb, "n't", *tail] for verb in verbs for tail in ([], ["'ve"])]
    parts += [[verb, "n't"] for verb in _words("ai are is was were have has dare")]
    parts += [[verb, "'ve"] for verb in _words("could might must should would")]

    cuts: dict[str, tuple[int, ...]] = {}
    for words, apostrophe, title in product(parts, ("'", "", "’"), (False, True)):
        head, *tail = words
        spelled = [word.replace("'", apostrophe) for word in (head.title() if title else head, *tail)]
        cuts["".join(spelled)] = tuple(len("".join(spelled[:count])) for count in range(1, len(spelled)))
    for word in _words("ill its hell shell shed were well whore"):
        cuts.pop(word, None)
        cuts.pop(word.title(), None)
    rest = "can|not Can|not gon|na Gon|na got|ta Got|ta y'|all y|all c'm|on C'm|on how|'d|'y How|'d|'y let|'s Let|'s"
    for text in _words(rest):
        for spelling in (text, text.replace("'", "’")):
            pieces = spelling.split("|")
            cuts["".join(pieces)] = tuple(len("".join(pieces[:count])) for count in range(1, len(pieces)))
    for hour, half in product(range(1, 13), ("am", "pm", "a.m.", "p.m.")):
        cuts[f"{hour}{half}"] = (len(str(hour)),)
    return cuts


CONTRACTIONS = _contractions()
"""Contraction to the offsets at which it is cut."""


def _joined() -> list[str]:
    """What the general rules cut and English does not."""
    abbreviations = (
        "Adm Ak Ala Apr Ariz Ark Aug Bros Calif Co Colo Conn Corp Dec Del Dr E.g Feb Fla Ga Gen Gov I.e Ia Id Ill Inc "
        "Ind Jan Jr Jul Jun Kan Kans Ky La Ltd Mar Mass Md Messrs Mich Minn Miss Mo Mont Mr Mrs Ms Mt Neb Nebr Nev Nov "
        "Oct Okla Ore Pa Ph.D Prof Rep Rev Sen Sep Sept St Tenn Va Wash Wis a.m co e.g i.e p.m v.s vs "
        "a b c d e f g h i j k l m n o p q r s t u v w x y z ä ö ü"
    )
    clipped = "doin goin havin lovin nothin nuthin ol somethin"
    apostrophes = "'' 'S 's 'd 'll 're 'em 'nuff 'bout 'cause 'cos 'coz 'cuz 'Cause 'Cos 'Coz 'Cuz :'( :') :'-( :'-)"
    apostrophes += "".join(f" {word}' {word.title()}'" for word in clipped.split())
    emoticons = (
        "(-8 (: (; (= ): 8) 8-) :( :) :* :-/ :-0 :-3 :-D :-O :-P :-X :-o :-p :-x :-| :/ :0 :1 :3 :> :D :O :P :X :] :o "
        ":p :x :| :} ;) ;-D ;D </3 <3 <33 <333 =( =) =/ =3 =D =[ =] =| [: [= ]= (*_*) (._.) (>_<) :-((( :-))) (-: (-; "
        "(-_-) (^_^) (o: (¬_¬) (ಠ_ಠ) )-: ._. 8-D :(( :() :)) :-( :-) :-* :-> :-] :-} :o) ;-) ;_; <.< >.< >.> >:( >:o "
        "[-: o.O :((( :))) :-(( :-))"
    )
    joined = [f"{stem}." for stem in abbreviations.split()]
    joined += [word.replace("'", mark) for word in apostrophes.split() for mark in ("'", "’")]
    joined += [f"{hour}{half}.m." for hour in range(1, 13) for half in "ap"]
    return [*joined, *emoticons.split(), "and/or", "w/o", "‘S", "‘s", "<space>", '\\")']


JOINED = _joined()
"""Cut by the general rules, one word all the same. (Contractions with a full stop are joined first, then cut.)"""

LONGEST_JOIN = 5
"""Words that the general rules make of the longest of them."""

_UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa "
    "mbar mb MB kb KB gb GB tb TB T G M K км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч кПа "
    "Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ كم كم² كم³ م م² م³ سم سم² سم³ مم مم² مم³ غرام جرام جم كغ ملغ كوب اكواب"
)
UNITS = tuple(_words(_UNITS))
"""Units of measure: a word of their own behind a digit."""
