"""Small things that every part of spu may use. They import nothing else of spu."""
