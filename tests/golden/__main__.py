"""Writes the golden files anew."""

from . import FOLDER, make

make(FOLDER)
