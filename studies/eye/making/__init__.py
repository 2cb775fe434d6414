"""Making the eye: the tower alone, then through the language model, in stages that go on where they were."""
