"""What the server answers: a module for each family of routes.

A module has `routes(service) -> list[Route]`, made of `endpoint.post` and `endpoint.get`, and is
listed in `app`. An answer is a coroutine function of a `Call`, which has the checked body, the
caller and the service; it asks `call.resolve` whom `model` means, raises `ApiError` or an error of
the runtime, and gives a starlette Response. Whoever waits for it may be cancelled: its client has
gone.
"""
