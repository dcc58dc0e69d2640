"""Tables, figures and the section, made from JSON alone. Loads no torch."""
