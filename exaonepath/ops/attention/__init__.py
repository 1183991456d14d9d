"""Attention inside segments of packed tokens: the public operation, its layout, rotation and backends."""
