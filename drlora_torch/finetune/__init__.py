"""The main job: fine-tune a mixture-of-experts model with dynamic ranks."""
