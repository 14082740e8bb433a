"""YAML files that ship with Octavo: models, sharding, serving. Data only; imports nothing."""
