"""Training tasks, one LightningModule each, and what they read and leave in a run's folder."""
