"""Score requests: from the bytes of a body to pairs with decoded images and tokenized prompts."""
