"""ms-swift: models of parrot_sys in its programs, through a plugin file."""
