"""What is trained: one module a stage, all run by the same trainer."""
