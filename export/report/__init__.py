"""What a person looks at after an export: figures and pictures in one HTML file."""
