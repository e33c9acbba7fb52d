"""Works (a task, real data, a metric), where their files are, tokenizers, and batches."""
