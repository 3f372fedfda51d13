"""The default data set: pictures of concepts, conversations and benchmark tables about them."""
