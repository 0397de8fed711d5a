"""Evaluation: how well a model answers (head, relation, ?) and (?, relation, tail); see docs/method.md."""
