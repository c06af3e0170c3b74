"""What `import lark` offers to scripts and notebooks."""
