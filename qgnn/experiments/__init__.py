"""The papers' tables as data, and the engine that runs their rows side by side with the printed numbers: ``qgnn reproduce``."""
