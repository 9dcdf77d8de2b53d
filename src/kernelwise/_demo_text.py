"""The text on which `kernelwise demo` takes a perplexity, written for it."""

from __future__ import annotations

TEXT = """\
A small lighthouse stands at the end of the pier, and every evening an old woman climbs its stairs to light the lamp. \
She has done this for forty years, in storms and in calm weather, and the fishermen say that they would sooner trust her \
lamp than any map. When she was young the light burned oil, and she had to trim the wick twice a night. Today there is an \
electric bulb, and a switch by the door, but she still stays until the last boat has come in. She brings a book, a thermos \
of tea and a blanket. From the gallery she can see the whole bay: the long beach, the church on the hill, and the lights \
of the town, which go out one by one as the night grows late.

Water is one of the few substances that expand when they freeze. Most liquids shrink as they cool, because their molecules \
move more slowly and can be packed more closely together. Water does the same until it reaches about four degrees, and \
then it begins to grow again. The molecules arrange themselves in a pattern with open spaces, held in place by weak bonds \
between hydrogen and oxygen. This is why ice floats, why pipes burst in winter, and why a lake freezes from the top down. \
Below the ice the water stays liquid, and fish and plants can live there until spring. If ice were heavier than water, \
lakes would freeze from the bottom up, and few living things would survive the winter in them.

To bake a simple loaf of bread you need flour, water, salt and yeast. Mix the flour with the salt in a large bowl. Stir \
the yeast into warm water and wait a few minutes until it begins to foam, then pour it into the flour and mix everything \
into a rough dough. Turn it out onto a table and knead it for ten minutes, until it is smooth and springs back when you \
press it with a finger. Put the dough back into the bowl, cover it with a cloth, and leave it in a warm place until it has \
doubled in size. Shape it into a loaf, let it rise once more, and bake it in a hot oven for half an hour. The bread is \
done when it sounds hollow as you knock on the bottom. Let it cool before you cut it, however hard it is to wait.

A program is a list of instructions, and a computer follows them one after another. Some parts of a program run once, and \
others run many millions of times. If you want a program to be faster, it helps to know which parts are which. People often \
guess, and they are often wrong. It is better to measure: run the program, write down how long each part takes, and look \
at the largest numbers first. A change that makes a rare step ten times as fast may save nothing that anyone would notice, \
while a small gain in the innermost loop can save hours. After every change, check that the answers are still the same, \
because a wrong answer that arrives quickly is still a wrong answer.
"""
