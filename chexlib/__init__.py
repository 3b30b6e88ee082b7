"""chexlib: the thin package behind the AI-radiologist notebooks."""
