"""Files and data sets to tokenised prompts, and the order in which steps take them."""
