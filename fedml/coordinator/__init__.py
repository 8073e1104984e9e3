"""The coordinator: hosts runs for real sites, keeps versions, publishes releases."""
