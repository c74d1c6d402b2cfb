"""Twenty beginnings of texts, short and long, for greedy continuation."""

from __future__ import annotations

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "def fibonacci(n):\n",
    "The three primary colors are",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: How many legs does a spider have?\nA:",
    "To bake a simple loaf of bread you need",
    "In 1969, Neil Armstrong",
    "1, 1, 2, 3, 5, 8, 13,",
    "The mitochondria are",
    "She opened the door, looked outside and",
    "import numpy as np\n\n# the mean of each column\n",
    "Translate to Spanish: Good morning, how are you today?",
    "The main difference between a lake and a river is that",
    "My favorite season is autumn. The leaves turn red and gold, the air is cool, and in the evening",
    "Light travels faster than sound. This is why we see the lightning before we hear the thunder. In the same way,",
    "Rules of the house: 1. Take off your shoes. 2. Wash your hands. 3. Speak quietly after nine o'clock. 4.",
    "The old clockmaker had three apprentices. The first was quick, but careless. The second was careful, but slow. "
    "The third was neither quick nor careful, yet everybody in the town asked for him. One winter morning the "
    "clockmaker called all three of them into his workshop, closed the door and said:",
    "A train leaves the station at 9:00 and travels at 60 kilometers an hour. A second train leaves the same station "
    "at 10:00 and travels at 90 kilometers an hour in the same direction. To find out when the second train catches "
    "up with the first one, we",
)
