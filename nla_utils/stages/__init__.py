"""What the notebooks of §11 run with the model: targets, verbalizer, rollouts, ceilings, controls."""
