"""Learning from few labels: `transfer` (probes, fine-tuning, training from scratch), `simclr` and `lora`."""
