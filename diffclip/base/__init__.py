"""The ground floor: each small tool once, used by all above it; imports nothing of this project but its errors."""
