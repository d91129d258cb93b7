"""Long passes that go on where a killed process left them."""
