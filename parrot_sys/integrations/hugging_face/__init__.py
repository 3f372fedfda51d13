"""The Auto classes of transformers on exported checkpoints: `import parrot_sys` is all that they need."""
