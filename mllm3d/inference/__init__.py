"""Answers about volumes: a checkpoint folder, a scan and a question in; text and evidence out."""
